"""The miniature zoo: small, really trained multimodal models, and the demo."""
