"""The table of architectures: tensor names, settings of config.json, rotary embedding."""
