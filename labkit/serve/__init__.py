"""Servers in front of an artifact. Chapter 04 needs one (llama.cpp's); chapter 03 will add the rest."""
