"""The commands of `flyray`: what each takes, by theme. Every command's code is imported when it runs."""
