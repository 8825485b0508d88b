"""The operations an encoder is made of, and their implementations ("backends")."""
