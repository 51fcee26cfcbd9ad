"""What tests share: tiny models and tokenizers, made-up data, slow references, stand-ins for services."""
