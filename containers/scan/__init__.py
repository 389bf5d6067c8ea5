"""What is in an image: Trivy, policy, VEX, bills of materials, and the scan gate."""
