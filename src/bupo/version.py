"""The version, on the ground floor: whatever notes it may import it."""

VERSION = "0.2.0"
