-- Take up to limit due hooks, which nobody else gets for `lease`. ARGV: now, lease, limit.
-- Returns {ms until the next one is due or -1, then per hook: id, attempt, replays of its jobs so far}.

local now = now_ms(ARGV[1])
local taken = {}
for _, id in ipairs(call('ZRANGEBYSCORE', key('hooks'), '-inf', now, 'LIMIT', 0, tonumber(ARGV[3]))) do
  if call('EXISTS', key('job', id)) == 1 then
    call('ZADD', key('hooks'), now + tonumber(ARGV[2]), id)
    taken[#taken + 1] = id
    taken[#taken + 1] = call('HINCRBY', key('job', id), 'hook_attempt', 1)
    taken[#taken + 1] = tonumber(call('HGET', key('job', id), 'replays') or 0)
  else
    call('ZREM', key('hooks'), id)
  end
end
local head = call('ZRANGE', key('hooks'), 0, 0, 'WITHSCORES')
return { head[2] and math.max(0, tonumber(head[2]) - now) or -1, unpack(taken) }
