"""Backends: four ways to render the images of a request from the same draws.

They use kernel.c (`native`), OpenCV, DALI and Triton, respectively. Start with `selection`, then `threads`.
"""
