-- End an attempt without a result, fenced.
-- ARGV: now, worker, id, attempt, retry 0|1, delay or '', backoff, max_backoff, code, message,
--       result_ttl, dead_ttl, max_dead, keep 0|1
-- Returns the state afterwards, or '' for a job that is gone.

local now = now_ms(ARGV[1])
local worker, id, attempt, retry = ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local delay, backoff, max_backoff = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local code, message = ARGV[9], ARGV[10]
local result_ttl, dead_ttl, max_dead = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])

local job = key('job', id)
if not owns(id, worker, attempt) then
  return call('HGET', job, 'state') or ''
end
call('ZREM', key('leases'), id)
local burnt = call('HINCRBY', job, 'burnt', 1)
if retry and burnt < tonumber(call('HGET', job, 'max_attempts')) then
  local due = now + (delay or math.min(backoff * 2 ^ (burnt - 1), max_backoff))
  call('HSET', job, 'state', 'delayed', 'code', code, 'message', message)
  call('HDEL', job, 'worker') -- what becomes of the job says nothing of that worker any more
  stop_long(call('HGET', job, 'bucket'), worker)
  call('ZADD', key('delayed'), due, id)
  note(id, 'retry', now, 'due', due, 'code', code)
  local deadline = call('HGET', job, 'deadline')
  if deadline then
    call('ZADD', key('deadlines'), deadline, id)
  end
  return 'delayed'
end
if ARGV[14] == '0' then
  call('HDEL', job, 'payload')
  fail_for_good(id, now, code, message, result_ttl)
  return 'failed'
end
bury(id, now, code, message, result_ttl, dead_ttl, max_dead)
return 'failed'
