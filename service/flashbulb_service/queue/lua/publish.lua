-- Tell how fast a worker's batches are, for admission.
-- ARGV: now, worker, alive for, then per bucket: model, bucket, floor, base, row, cap.

local now = now_ms(ARGV[1])
local worker, alive = ARGV[2], now + tonumber(ARGV[3])
local KEPT_MS = 3600000
call('ZADD', key('alive'), alive, worker)
call('ZREMRANGEBYSCORE', key('alive'), '-inf', now)
call('PEXPIRE', key('alive'), KEPT_MS)
for i = 4, #ARGV, 6 do
  local speed = key('speed', ARGV[i], ARGV[i + 1])
  local entries = call('HGETALL', speed)
  for j = 1, #entries, 2 do
    if tonumber(string.match(entries[j + 1], '^%S+')) <= now then
      call('HDEL', speed, entries[j])
    end
  end
  call('HSET', speed, worker, string.format('%.0f ', alive) .. table.concat(ARGV, ' ', i + 2, i + 5))
  call('PEXPIRE', speed, KEPT_MS)
end
return 1
