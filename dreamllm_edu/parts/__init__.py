"""The pretrained parts: tokenizer, language model, vision, diffusion, and their losses."""
