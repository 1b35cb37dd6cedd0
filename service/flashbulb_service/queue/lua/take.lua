-- Lease planned jobs that are still queued, and fail those planned to be dropped.
-- ARGV: now, worker, lease, result_ttl, model, bucket, predicted ms, clock, when a lone job was seen or '',
--       what tells this call from others of the worker, number of models, number to take, then the worker's models,
--       then per job to take: id, charge; then ids to drop.
-- Returns {whether more waits for these models, {id, model, bucket, tenant, payload, attempt, burnt, enqueued,
--          whether somebody waits for its end}, ...}; nothing, if the job that was alone is so no longer.

local now = now_ms(ARGV[1])
local worker, lease, result_ttl = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local model, bucket, predicted, clock = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local seen, call_id, num_models, num = tonumber(ARGV[9]), ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12])
local first = 13 + num_models
local MAX_REFRESHED, KEPT_MS = 16, 3600000
local MAX_SEEN_AGO_MS = 100

local function more_waits()
  for i = 13, first - 1 do
    if has_work(ARGV[i]) then
      return 1
    end
  end
  return 0
end

-- A call without an answer is sent again: what the lost reply told, this one tells.
local function attempt_of_call(id)
  local job = call('HMGET', key('job', id), 'state', 'worker', 'call', 'attempt')
  return job[1] == 'running' and job[2] == worker and job[3] == call_id and tonumber(job[4])
end

local is_paused = gate_of(model) == 'paused'

-- A plan for one job holds while nothing has come beside it; else the whole window is to be read.
if seen then
  local others = is_paused or not is_alone(model, bucket)
  for i = 13, first - 1 do
    others = others or (ARGV[i] ~= model and has_work(ARGV[i]))
  end
  if (others or now - seen > MAX_SEEN_AGO_MS) and not attempt_of_call(ARGV[first]) then
    return { 1 }
  end
end

local function is_here(id)
  local job = call('HMGET', key('job', id), 'state', 'model', 'bucket')
  return job[1] == 'queued' and job[2] == model and job[3] == bucket
end

-- A call that is sent again may come minutes after its plan: what an operator or the clock has said since, counts.
local function is_wanted(id)
  local deadline = call('HGET', key('job', id), 'deadline')
  return not is_paused and (not deadline or tonumber(deadline) > now)
end

for i = first + 2 * num, #ARGV do
  if is_here(ARGV[i]) then
    leave(ARGV[i], model, bucket, call('HGET', key('job', ARGV[i]), 'tenant'))
    fail_overdue(ARGV[i], now, result_ttl)
  end
end

local batch = {}
for i = first, first - 1 + 2 * num, 2 do
  local id, charge, attempt = ARGV[i], tonumber(ARGV[i + 1])
  if is_here(id) and is_wanted(id) then
    local tenant = call('HGET', key('job', id), 'tenant')
    local total = used_by(model, tenant) + charge
    leave(id, model, bucket, tenant)
    call('ZADD', key('used'), total, tenant)
    call('ZADD', key('tenants', model, bucket), 'XX', total, tenant)
    attempt = call('HINCRBY', key('job', id), 'attempt', 1)
    call('HSET', key('job', id), 'state', 'running', 'worker', worker, 'started', now, 'charged', charge, 'call', call_id)
    call('ZREM', key('deadlines'), id)
    note(id, 'running', now, 'attempt', attempt)
  else
    attempt = attempt_of_call(id)
  end
  if attempt then
    call('ZADD', key('leases'), now + lease, id)
    batch[#batch + 1] = claimed(id, model, bucket, attempt)
  end
end

if #batch > 0 then
  -- Between the steps of long work a worker goes on with short work: one does not keep it from the other.
  if is_long(bucket) then
    call('ZADD', key('long'), now + predicted, worker) -- until `stop_long`: it may take longer than was predicted
  else
    call('ZADD', key('busy'), now + predicted, worker)
    call('ZREMRANGEBYSCORE', key('busy'), '-inf', '(' .. string.format('%.0f', now))
    call('PEXPIRE', key('busy'), KEPT_MS)
  end
  -- The clock is where newcomers start; accounts behind every model's clock say nothing any more.
  call('HSET', key('clock'), model, math.max(clock, tonumber(call('HGET', key('clock'), model) or 0)))
  local least = clock
  for _, other in ipairs(call('HVALS', key('clock'))) do
    least = math.min(least, tonumber(other))
  end
  call('ZREMRANGEBYSCORE', key('used'), '-inf', least)
  -- What a tenant used elsewhere is not yet in this bucket's order: the first ones are put right.
  for _, name in ipairs(call('ZRANGE', key('tenants', model, bucket), 0, MAX_REFRESHED - 1)) do
    call('ZADD', key('tenants', model, bucket), used_by(model, name), name)
  end
end
settle(model)
return { more_waits(), unpack(batch) }
