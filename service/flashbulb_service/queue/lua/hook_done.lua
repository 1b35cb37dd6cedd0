-- End one delivery attempt. ARGV: now, id, attempt, replays, delay until the next one or '', counts 0|1.
-- The owner of a later attempt wins, and so does a delivery after a replay.

local hook = call('HMGET', key('job', ARGV[2]), 'hook_attempt', 'replays')
if (hook[1] and hook[1] ~= ARGV[3]) or (hook[2] or '0') ~= ARGV[4] then
  return 0
end
if ARGV[5] == '' or not hook[1] then
  call('ZREM', key('hooks'), ARGV[2])
else
  if ARGV[6] == '0' then
    call('HINCRBY', key('job', ARGV[2]), 'hook_attempt', -1)
  end
  call('ZADD', key('hooks'), 'XX', now_ms(ARGV[1]) + tonumber(ARGV[5]), ARGV[2])
  wake_deliverer() -- one that sleeps knows of a later time only
end
return 1
