-- ARGV: now, dead_ttl.
-- Returns {running, delayed, dead, ms of the oldest short job, of the oldest long one, model, queued, model, queued, ...}.

local now = now_ms(ARGV[1])
local counts, since = {}, { short = now, long = now }
for _, model in ipairs(call('SMEMBERS', key('models'))) do
  counts[#counts + 1] = model
  counts[#counts + 1] = call('ZCARD', key('waiting', model))
  local oldest = call('ZRANGE', key('waiting', model), 0, 0, 'WITHSCORES')
  local lane = is_long(call('ZRANGE', key('ready', model), 0, 0)[1]) and 'long' or 'short' -- a model has one
  since[lane] = math.min(since[lane], tonumber(oldest[2]))
end
local dead = call('ZCOUNT', key('dead'), '(' .. string.format('%.0f', now - tonumber(ARGV[2])), '+inf')
local running, delayed = call('ZCARD', key('leases')), call('ZCARD', key('delayed'))
return { running, delayed, dead, now - since.short, now - since.long, unpack(counts) }
