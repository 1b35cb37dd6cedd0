-- Read what a worker may serve next; changes nothing.
-- ARGV: now, worker, most rows per bucket, models...
-- Returns {now, live workers, others with long work, {what look_into tells of each bucket}}.

local now = now_ms(ARGV[1])
local worker, most_rows = ARGV[2], tonumber(ARGV[3])
local MAX_BUCKETS = 16 -- keeps one call short

local buckets = {}
for i = 4, #ARGV do
  local ready = gate_of(ARGV[i]) == 'paused' and {} or call('ZRANGE', key('ready', ARGV[i]), 0, MAX_BUCKETS - 1)
  for _, bucket in ipairs(ready) do
    local found = look_into(ARGV[i], bucket, most_rows)
    if #found[5] > 0 then
      buckets[#buckets + 1] = found
    end
  end
end
local long = call('ZCARD', key('long')) - (call('ZSCORE', key('long'), worker) and 1 or 0)
return { now, call('ZCOUNT', key('alive'), now, '+inf'), long, buckets }
