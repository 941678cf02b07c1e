"""The models of other machines that run mlxproxy: what they offer, and the way to them and back."""
