"""MEFT in other people's code: peft, transformers' Trainer and what logs it. Importing this alone does nothing."""
