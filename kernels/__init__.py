"""Tensor functions: what each kernel means in plain torch (`reference`), and its fast twins."""
