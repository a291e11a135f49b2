"""Speech: wav2vec 2.0 pre-training and CTC fine-tuning under any norm."""
