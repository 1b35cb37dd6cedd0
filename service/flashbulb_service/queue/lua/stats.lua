-- ARGV: now, dead_ttl. Returns {running, delayed, dead, oldest age in ms, model, queued, model, queued, ...}.

local now = now_ms(ARGV[1])
local counts, since = {}, now
for _, model in ipairs(call('SMEMBERS', key('models'))) do
  counts[#counts + 1] = model
  counts[#counts + 1] = call('ZCARD', key('waiting', model))
  local oldest = call('ZRANGE', key('waiting', model), 0, 0, 'WITHSCORES')
  since = math.min(since, tonumber(oldest[2]))
end
local dead = call('ZCOUNT', key('dead'), '(' .. string.format('%.0f', now - tonumber(ARGV[2])), '+inf')
return { call('ZCARD', key('leases')), call('ZCARD', key('delayed')), dead, now - since, unpack(counts) }
