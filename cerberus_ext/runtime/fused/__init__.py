"""The target model's step, traced once and run as one native program: trace, lower, program, native, step."""
