"""What several methods share: statistics, affine passes, devices, running averages, checks."""
