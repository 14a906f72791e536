"""The web page at `/`: to chat, and to watch the cluster work. Plain files, served as they are."""
