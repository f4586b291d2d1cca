"""From a declared matrix to a frozen plan, and what it will cost."""
