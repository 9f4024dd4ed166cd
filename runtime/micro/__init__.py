"""Microcontrollers: networks in half precision and 8-bit integers, in a given memory."""
