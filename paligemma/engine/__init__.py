"""Many prompts, one model: greedy, sampling, beams, likelihoods; tensors and token ids, no text."""
