"""What a run tells while it goes: progress for the live display, heartbeats for the watchdog, metrics for people."""
