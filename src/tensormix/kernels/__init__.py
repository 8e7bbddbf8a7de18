"""Fast products behind the operators: tensors in, tensors out. PyTorch's dispatcher chooses by device."""
