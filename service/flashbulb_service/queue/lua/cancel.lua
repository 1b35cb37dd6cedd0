-- Cancel a live job. ARGV: now, id, result_ttl. Returns 1, 0 when it had already ended, -1 when unknown.

return cancel(ARGV[2], now_ms(ARGV[1]), tonumber(ARGV[3]))
