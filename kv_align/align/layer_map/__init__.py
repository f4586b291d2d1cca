"""Which teacher layers a student layer is compared with."""
