-- Do what is due. ARGV: now, limit, result_ttl, dead_ttl, max_dead, then of one who reaps again and again:
--       when it last got an answer, how long a lease is, most time between two answers, until when leases are left.
-- Returns {how many jobs moved, now, until when leases are left}.

local now = now_ms(ARGV[1])
local limit = tonumber(ARGV[2])
local result_ttl, dead_ttl, max_dead = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local heard, lease, most_apart, left_until = unpack(ARGV, 6)
local moved = 0

-- Decided here: after an outage this call may come out of the server's buffer, given up by its caller long ago.
local spared = 0
if heard then
  spared = now + tonumber(lease)
  if now - tonumber(heard) <= tonumber(most_apart) then
    spared = math.min(spared, tonumber(left_until)) -- which another server's clock may have told
  end
end

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

for _, id in ipairs(now < spared and {} or due('leases')) do
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
return { moved, now, spared }
