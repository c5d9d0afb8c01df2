"""Where prompts come from: one module per format, each giving the same `Prompt`.

`prompts.read_prompts` chooses the module by the content of what it is given.
"""
