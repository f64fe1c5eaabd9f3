"""What every long-lived process needs of the operating system: signals and ports."""
