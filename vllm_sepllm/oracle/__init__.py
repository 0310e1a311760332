"""What SepLLM attention computes, as dense masks: everything is compared with it."""
