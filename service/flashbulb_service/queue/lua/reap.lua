-- Do what is due. ARGV: now, limit, result_ttl, dead_ttl, max_dead, '1' to leave leases that ran out.
-- Returns how many jobs moved.

local now = now_ms(ARGV[1])
local limit = tonumber(ARGV[2])
local result_ttl, dead_ttl, max_dead = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local moved = 0

local function due(name)
  local ids = call('ZRANGEBYSCORE', key(name), '-inf', now, 'LIMIT', 0, limit - moved)
  moved = moved + #ids
  return ids
end

for _, id in ipairs(due('deadlines')) do
  local job = call('HMGET', key('job', id), 'state', 'model', 'bucket', 'tenant')
  if job[1] == 'queued' then
    leave(id, job[2], job[3], job[4])
    settle(job[2])
  else
    call('ZREM', key('delayed'), id)
  end
  fail_overdue(id, now, result_ttl)
end

for _, id in ipairs(ARGV[6] == '1' and {} or due('leases')) do
  call('ZREM', key('leases'), id)
  local job = call('HMGET', key('job', id), 'worker', 'max_attempts')
  local message = 'worker ' .. job[1] .. ' went silent and lost its lease'
  if call('HINCRBY', key('job', id), 'burnt', 1) < tonumber(job[2]) then
    call('HSET', key('job', id), 'code', 'worker_lost', 'message', message)
    requeue(id)
  else
    bury(id, now, 'worker_lost', message, result_ttl, dead_ttl, max_dead)
  end
end

for _, id in ipairs(due('delayed')) do
  call('ZREM', key('delayed'), id)
  requeue(id)
end

-- A worker that took a token and died before its claim must not leave the others asleep.
for _, model in ipairs(call('SMEMBERS', key('models'))) do
  settle(model)
end
return moved
