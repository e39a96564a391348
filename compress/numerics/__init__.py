"""Pure tensor functions: the mathematics that steps, evaluators and exporters share."""
