"""fp-bench quality: how well a bundle controls expression, pose, camera and identity, against ground-truth renders."""
