"""Fine-tuning on one's own rows with one command: settings, data, plan, training, adapters, generation, evaluation."""
