"""How arrays are placed on devices, and how the processes of a run communicate."""
