"""What the tab and the report show of measurements, as arrays and metadata. Knows no TensorBoard, page or torch."""
