"""Code that the programs in benchmarks/ share: records, the baseline, peers, images and the parts of the GPU check."""
