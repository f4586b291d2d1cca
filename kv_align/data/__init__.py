"""Where texts come from (`arithmetic`, `gsm8k`, `text`) and how they become batches (`encode`, `batch`, `loader`)."""
