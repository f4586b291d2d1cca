"""Teachers and students: loading, placing on devices, adapters, and capturing what their attention computes."""
