-- End one delivery attempt. ARGV: now, id, attempt, delay until the next one or ''. A later attempt's owner wins.

local attempt = call('HGET', key('job', ARGV[2]), 'hook_attempt')
if attempt and attempt ~= ARGV[3] then
  return 0
end
if ARGV[4] == '' or not attempt then
  call('ZREM', key('hooks'), ARGV[2])
else
  call('ZADD', key('hooks'), 'XX', now_ms(ARGV[1]) + tonumber(ARGV[4]), ARGV[2])
end
return 1
