"""Teaching: one loop for every stage and every way of training."""
