"""What suites, fine-tuning and the profile share: methods, models, tokens, checkpoints and the loop that trains."""
