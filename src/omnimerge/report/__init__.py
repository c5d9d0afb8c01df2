"""Result files to Markdown, HTML and model cards."""
