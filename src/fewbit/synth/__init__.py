"""What stands in for images: made from BatchNorm statistics, or ranges that are read off them."""
