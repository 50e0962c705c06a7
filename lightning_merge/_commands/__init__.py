"""The commands of ``lightning-merge``, a module each; part of the front door, so they may import what they need."""
