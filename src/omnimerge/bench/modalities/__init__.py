"""The modality line: a vision, an audio and a video expert over one mini-LLM become one model."""
