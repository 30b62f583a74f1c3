"""The target model during a decode: its forwards over trees, with attention and products of ours."""
