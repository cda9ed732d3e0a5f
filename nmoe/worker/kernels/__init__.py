"""The operations of the model, each a plain-torch reference with documented shapes, which is what the CPU runs."""
