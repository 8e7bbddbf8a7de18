"""Many runs: one recipe at many depths, methods under one budget, a family of dense models, a prediction before all."""
