"""What lives in RAM and passes through the card: when (schedule), who waits for whom (engine), and by which means."""
